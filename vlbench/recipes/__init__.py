"""Recipes: one paper, one module, each with its settings, model and loss."""
