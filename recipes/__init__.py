"""Recipes: one module per model and layout, values only.

`fragment()` gives the values, `finetune_recipe()` the same as a NeMo-Run task.
"""
