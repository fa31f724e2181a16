"""What make decides before it makes: which settings are valid, where rooms lie, their questions, how a script runs."""
