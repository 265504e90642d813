"""The toy world: small images of coloured shapes, on which every claim can be checked exactly."""
