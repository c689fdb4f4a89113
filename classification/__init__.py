"""Students and teachers that classify images."""
