"""Configurations: data of the package, so that an installation finds them by name."""
