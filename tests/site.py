"""What turns the documents of the repository into those of the site: MkDocs calls the hooks below, see ``mkdocs.yml``.

Links in the repository lead to files. Here README and its neighbours become pages of the site, and a link to a file
that is no page is shown as its text. Every page's Markdown is put beside it, for programs that read no HTML.
"""

import posixpath
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
PAGES = {
    "README.md": "index.md",
    "SECURITY.md": "security.md",
    "ARCHITECTURE.md": "architecture.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "docs/causes": "symptoms.md",
}
"""What lies beside docs/ and is a page of the site, and the page that stands for a folder."""
_LINK = re.compile(r"(?P<shown>!?\[(?:[^\[\]]|\[[^\[\]]*\])*\])\((?P<to>[^)\s]+)\)")
_FENCE = re.compile(r"(^```.*?^```$)", re.MULTILINE | re.DOTALL)


def source(page: str) -> str:
    """The file of the repository that a page of the site is made from."""
    return next((file for file, of in PAGES.items() if of == page and file.endswith(".md")), f"docs/{page}")


def linked(markdown: str, page: str) -> str:
    """The Markdown of ``page`` with every link as the site has it."""
    parts = _FENCE.split(markdown)
    parts[::2] = [_LINK.sub(lambda link: _link(link, page), part) for part in parts[::2]]
    return "".join(parts)


def _link(link: re.Match[str], page: str) -> str:
    target, mark, anchor = link["to"].partition("#")
    if not target or "://" in target:
        return link[0]
    file = posixpath.normpath(posixpath.join(posixpath.dirname(source(page)), target))
    to = PAGES.get(file) or (file.removeprefix("docs/") if file.startswith("docs/") else None)
    if to is None or to.endswith((".json", ".jsonl")):
        return link["shown"][1:-1]
    return f"{link['shown']}({posixpath.relpath(to, posixpath.dirname(page) or '.')}{mark}{anchor})"


def llms(name: str, description: str, nav: Sequence[Mapping[str, Any]], texts: Mapping[str, str]) -> str:
    """The pages for programs that read, as https://llmstxt.org asks: a link to each with its first sentence.

    Args:
        name: That of the site.
        description: What it is about.
        nav: The pages as ``mkdocs.yml`` orders them: sections of pages, or pages.
        texts: The Markdown of each page by its name.
    """
    lines = [f"# {name}", "", f"> {description}"]
    for entry in nav:
        ((title, pages),) = entry.items()
        lines += ["", f"## {title}", ""]
        for page in [entry] if isinstance(pages, str) else pages:
            ((called, file),) = page.items()
            lines.append(f"- [{called}]({file}): {first_sentence(texts[file])}")
    return "\n".join(lines) + "\n"


def first_sentence(markdown: str) -> str:
    """The first sentence of a document below its title; of a cause, the one that says why it happens."""
    _, cause, why = markdown.partition("## Why it happens\n\n")
    body = re.sub(r"(?s:```.*?```|<!--.*?-->)|^[#|].*$", "", why if cause else markdown, flags=re.MULTILINE)
    paragraph = next((" ".join(part.split()) for part in re.split(r"\n\s*\n", body) if part.strip()), "")
    plain = re.sub(r"!?\[([^\]]*)\]\([^)]*\)|\*\*", lambda link: link[1] or "", paragraph)
    found = re.match(r".+?[.?](?=\s|$)", plain.removeprefix("- "))
    return found[0] if found else plain


# --- what MkDocs calls ----------------------------------------------------------------------------------------------

_markdown: dict[str, str] = {}


def on_files(files: Any, config: Any) -> Any:
    """Add the pages that lie beside docs/."""
    from mkdocs.structure.files import File

    for file, page in PAGES.items():
        if file.endswith(".md"):
            files.append(File.generated(config, page, content=(ROOT / file).read_text("utf-8")))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Keep the links of a page, and its Markdown for `on_post_build`."""
    name: str = page.file.src_uri
    _markdown[name] = linked(markdown, name)
    return _markdown[name]


def on_post_build(config: Any) -> None:
    """Put the Markdown of every page beside it, ``causes/b-trained.md`` beside ``causes/b-trained/``, and list them."""
    listed = llms(config["site_name"], config["site_description"], config["nav"], _markdown)
    (Path(config["site_dir"]) / "llms.txt").write_text(listed, "utf-8")
    for name, markdown in _markdown.items():
        (Path(config["site_dir"]) / name).write_text(markdown, "utf-8")
