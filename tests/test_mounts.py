"""The mount table: longest prefix, escapes, over-mounts, and what counts as a network."""

from __future__ import annotations

from pathlib import Path, PurePosixPath

import pytest

from mupx.mounts import NETWORK, existing, file_system

TABLE = r"""22 1 0:21 / / rw,relatime shared:1 - ext4 /dev/vda1 rw
23 22 0:22 / /proc rw - proc proc rw
36 22 0:30 / /home rw,noatime master:1 propagate_from:2 - nfs4 server:/home rw,vers=4.2
37 36 0:31 / /home/ann/scratch rw - xfs /dev/sdb1 rw
38 22 0:32 / /mnt/with\040space rw - cifs //server/share rw
39 22 0:33 / /data rw - ext4 /dev/sdc1 rw
40 22 0:34 / /data rw - fuse.sshfs ann@host:/data rw
41 22 0:35 / /lustre rw - lustre mds@tcp:/fs rw
this line is damaged
"""


@pytest.mark.parametrize(
    ("path", "kind"),
    [
        ("/", "ext4"),
        ("/tmp/runs", "ext4"),
        ("/home/ann", "nfs4"),
        ("/home/ann/scratch/runs", "xfs"),
        ("/home/ann/scratchy", "nfs4"),
        ("/homes/ann", "ext4"),
        ("/mnt/with space/runs", "cifs"),
        ("/data/runs", "fuse.sshfs"),
        ("/lustre", "lustre"),
    ],
)
def test_the_longest_mount_point_decides_and_the_last_of_two(path: str, kind: str) -> None:
    assert file_system(PurePosixPath(path), TABLE) == kind
    local = kind in ("ext4", "xfs")
    assert (kind in NETWORK) != local


def test_an_empty_table_says_nothing() -> None:
    assert file_system(PurePosixPath("/tmp"), "") is None


def test_a_comparison_of_characters_would_be_seen() -> None:
    assert "/homes/ann".startswith("/home")
    assert file_system(PurePosixPath("/homes/ann"), TABLE) != "nfs4"


def test_existing_follows_links_and_goes_up(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    assert existing(tmp_path / "link" / "runs" / "deep") == (tmp_path / "real").resolve()
    (tmp_path / "dangling").symlink_to("nowhere/at/all")
    assert existing(tmp_path / "dangling") == tmp_path.resolve()
