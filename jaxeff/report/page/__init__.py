"""A report as one self-contained HTML file: no network, no other file, no library.

report -> figures (what is drawn of the model), details (what is drawn of one layer)
       -> rendering: template, style and script -> the page
"""

from jaxeff.report.page.rendering import check_available as check_available
from jaxeff.report.page.rendering import render as render
