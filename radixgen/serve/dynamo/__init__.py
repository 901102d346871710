"""The engine as a worker of NVIDIA Dynamo. Requires `radixgen[dynamo]`."""
