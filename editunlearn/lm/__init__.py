"""The patient: loading a model, where its parts are, what goes in and what comes out."""
