"""The checks of arguments, the registered ops with their autograd Functions, and the choice of backend."""
