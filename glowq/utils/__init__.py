"""What has nothing to do with quantization: folders written whole, Hub access, logging, versions, argument checks.

May import `errors` only."""
