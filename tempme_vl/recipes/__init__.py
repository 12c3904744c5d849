"""The recipes: their options and presets, how a run starts, its loop and its report; and each recipe in one module.

The scripts in recipes/ start them. A recipe's module reads top to bottom: options, `parse`, `main`.
"""
