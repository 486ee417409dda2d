"""What the page of a run looks like: its frame and its style, light and dark."""

from __future__ import annotations

from string import Template

# Colours of text are 4.5 to 1 or more on their ground; those of lines and marks 3 to 1.
STYLE = """
:root { color-scheme: light dark; --ground: #ffffff; --soft: #f3f4f6; --ink: #17191c; --quiet: #565c65; --line: #c8ccd2;
  --link: #1a5fb4; --right: #1d6f43; --wrong: #a8420e; --blue: #2f7fd0; --orange: #c9661a; --green: #2c8c5a;
  --violet: #8d63c8; }
@media (prefers-color-scheme: dark) {
  :root { --ground: #15171a; --soft: #202328; --ink: #e7e9ec; --quiet: #a6adb7; --line: #454b54; --link: #7db4f5;
    --right: #6fcf97; --wrong: #f5a06a; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1.5rem 1.25rem 4rem; max-width: 62rem; background: var(--ground); color: var(--ink);
  font: 1rem/1.55 system-ui, sans-serif; overflow-wrap: anywhere; }
h1 { font-size: 1.7rem; line-height: 1.25; margin: 0.5rem 0; }
h2 { font-size: 1.3rem; margin: 3rem 0 0.5rem; padding-top: 0.75rem; border-top: 1px solid var(--line); }
h3 { font-size: 1.05rem; margin: 2rem 0 0.25rem; }
p, figcaption { max-width: 46rem; }
a { color: var(--link); }
nav ul { display: flex; flex-wrap: wrap; gap: 0.25rem 1.25rem; padding: 0; list-style: none; }
.lead { font-size: 1.1rem; }
.figure { font-size: 2.2rem; font-weight: 600; margin: 0.5rem 0 0; }
.quiet, figcaption, caption, summary { color: var(--quiet); font-size: 0.9rem; }
.left-out { border-left: 4px solid var(--orange); background: var(--soft); padding: 0.6rem 0.9rem; }
figure { margin: 1rem 0; overflow-x: auto; }
figure > svg { display: block; width: 100%; height: auto; color: var(--ink); }
figure > svg text { font-family: system-ui, sans-serif !important; }
.wide { overflow-x: auto; margin: 1rem 0; }
table { border-collapse: collapse; font-size: 0.9rem; }
caption { text-align: left; padding-bottom: 0.3rem; }
th, td { text-align: left; padding: 0.3rem 0.9rem 0.3rem 0; border-bottom: 1px solid var(--line);
  vertical-align: middle; overflow-wrap: normal; }
thead th { font-weight: 600; vertical-align: bottom; }
tbody th { font-weight: 400; }
.numbers td { font-variant-numeric: tabular-nums; text-align: right; white-space: nowrap; }
.numbers thead th:not(:first-child) { text-align: right; }
td img, th img { margin: 2px 4px 2px 0; vertical-align: middle; border: 1px solid var(--line); }
img.small { image-rendering: pixelated; }
svg.series { vertical-align: middle; margin: 2px 6px 2px 0; border: 1px solid var(--line); }
svg.series polyline { fill: none; stroke-width: 1.5; }
.cards { display: flex; flex-wrap: wrap; gap: 0.75rem 1.25rem; padding: 0; list-style: none; font-size: 0.9rem; }
.cards li { max-width: 20rem; }
.row { display: inline-block; margin-right: 1.2rem; }
.right { color: var(--right); font-weight: 600; white-space: nowrap; }
.wrong { color: var(--wrong); font-weight: 600; white-space: nowrap; }
pre { background: var(--soft); padding: 0.8rem 1rem; overflow-x: auto; white-space: pre-wrap; }
code { font-family: ui-monospace, monospace; font-size: 0.92em; }
@media print { body { max-width: none; } nav { display: none; } }
"""

# The policy lets the page load nothing but what it holds.
FRAME = Template("""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'; img-src data:">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>$title</title>
<style>$style</style>
</head>
<body>
<header>
$header
</header>
<nav aria-label="Sections"><ul>$links</ul></nav>
<main>
$main
</main>
<footer><p class="quiet">$footer</p></footer>
</body>
</html>
""")


def page(title: str, header: str, sections: list[tuple[str, str, str]], footer: str) -> str:
    """A page of sections (id, heading, content); all of it is HTML already."""
    links = "".join(f'<li><a href="#{name}">{heading}</a></li>' for name, heading, _ in sections)
    main = "\n".join(
        f'<section aria-labelledby="{name}"><h2 id="{name}">{heading}</h2>\n{content}\n</section>'
        for name, heading, content in sections
    )
    return FRAME.substitute(title=title, style=STYLE, header=header, links=links, main=main, footer=footer)
