"""Methods on equal terms: the declared sweep, the queue of runs, what each costs, and the views of the results."""
