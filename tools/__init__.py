"""Programs that maintain the repository. They run from a checkout and are not installed with the package."""
