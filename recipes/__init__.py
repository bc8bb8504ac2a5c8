"""Recipes: one module per model and layout. `fragment()` gives the values, `finetune_recipe()` a NeMo-Run task."""
