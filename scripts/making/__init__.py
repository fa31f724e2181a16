"""What make decides before it makes: which settings are right, where rooms lie, what they are asked, how a script runs."""
