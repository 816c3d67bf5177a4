"""The network: a function of arrays, bound to a head template."""
