"""Role, fan-in and fan-out of every parameter, and the law it is drawn from."""

from mupx.roles.building import Factory
from mupx.roles.description import describe
from mupx.roles.initial import initial_std, own_std

__all__ = ["Factory", "describe", "initial_std", "own_std"]
