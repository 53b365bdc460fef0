"""The choice of the next token: sampling, grammars and thinking budgets."""
