"""Web page of the workbench (Gradio), served on this machine only."""
