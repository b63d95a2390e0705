"""Options, console output and expert choice shared by the verbs."""
