"""How one module is executed: each backend is a drop-in callable for the module it replaces."""
