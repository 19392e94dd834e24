"""What a recipe is told: keys, types, defaults, and the command line around them."""
