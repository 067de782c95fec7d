"""Look inside trained nets: activations, patches, evidence for a class, probes."""
