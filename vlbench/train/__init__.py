"""Training: one loop for every recipe, and what a recipe builds on: losses, configuration groups, schedules."""
