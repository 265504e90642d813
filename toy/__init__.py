"""The toy world: small pictures of coloured shapes, on which every claim can be checked exactly."""
