"""The data sets ``--data`` knows: a name, and the ``load(directory=None, **args)`` behind it.

``fashion-mnist-14`` travels inside the package and ``synthetic`` is made on the spot. The others are
looked for in the folder you name, in ``$MUPX_DATA_DIR/<name>``, in ``/usr/share/datasets/<name>`` and
in the user's cache, and are downloaded into that cache, checksum verified, when none of them has the
files. ``image-folder`` is your own and never downloaded.
"""

from mupx.registry import Registry

DATASETS = Registry(
    "data set",
    {
        "fashion-mnist-14": "mupx.datasets.fashion_mnist_14:load",  # 8,000 / 2,000 / 2,000, 14×14, embedded
        "fashion-mnist-14-full": "mupx.datasets.fashion_mnist_14_full:load",  # 55,000 / 5,000 / 10,000, 14×14
        "fashion-mnist": "mupx.datasets.fashion_mnist:load",  # 55,000 / 5,000 / 10,000, 28×28
        "mnist": "mupx.datasets.mnist:load",  # 55,000 / 5,000 / 10,000, 28×28
        "cifar10": "mupx.datasets.cifar10:load",  # 45,000 / 5,000 / 10,000, 3×32×32
        "cifar100": "mupx.datasets.cifar100:load",  # 45,000 / 5,000 / 10,000, 3×32×32
        "image-folder": "mupx.datasets.image_folder:load",  # your own, {train,val}/class/*.{jpg,png}
        "wikitext-2": "mupx.datasets.wikitext_2:load",  # words: next token, or the word in the middle
        "wikitext-2-small": "mupx.datasets.wikitext_2:load_small",  # its valid.txt to train, test.txt to test
        "tiny-shakespeare": "mupx.datasets.tiny_shakespeare:load",  # characters: next token
        "synthetic": "mupx.datasets.synthetic:load",  # 12,800 / 1,000 / 1,000, 24 features, made from a seed
    },
)
