"""The runtime's verbs, a file for each group of them; `bitskip.program` lists them."""
