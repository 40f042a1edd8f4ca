"""The data that travels between the packages: a group, its factors, and their int8 form.

May import `errors` only."""
