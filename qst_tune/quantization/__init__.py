"""Pure functions that turn weights into codes and back."""
