"""How everything here measures, on which machine, and what becomes of the results."""
