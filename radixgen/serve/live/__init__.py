"""The live page: the tree as it lives, in a browser. `routes.tree_routes` needs `radixgen[serve]`."""
