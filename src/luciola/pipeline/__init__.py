"""The R1 pipeline: stages that are ordinary runs, one after another, and the table that sets them side by side."""
