"""The data that the recipes are tested on."""

from recipes.conftest import data as data
