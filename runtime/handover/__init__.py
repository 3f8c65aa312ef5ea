"""Pages of a prompt that one engine has computed and another one goes on with."""
