"""Live page: the radix tree in a browser, updated as it changes. Requires `radixgen[serve]`."""
