"""How good a model is on people it never saw: who, what is measured, the report."""
