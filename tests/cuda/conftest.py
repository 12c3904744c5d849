"""Makes the recipes importable, and the data that they are tested on."""

from recipes.conftest import data as data
