"""Programs around the package: the demo world and the published results."""
