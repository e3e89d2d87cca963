"""The report of a plan: tables, figures and the page that shows them."""
