"""The op contract, the autograd Functions over registered ops, and the choice of backend. Import the submodules."""
