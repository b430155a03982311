"""The pages for a browser, `/` and `/docs`: HTML, one stylesheet, and modules without a library or a build step."""
