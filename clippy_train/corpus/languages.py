"""The language of a file, by its full name and, where several languages share that, by its first lines.

Promises: a pure function of name and text; languages are named as by GitHub's linguist, like those of the Code Clippy
data. Names are Pygments' with `NAMES` over them; a script without a known name goes by its first line. Pygments' own
analysis of content is not used: it takes Perl's tables (`.pl`) for Prolog and C headers for Objective-C, and some 9 ms
a file. Cost: some 10 microseconds a file.
"""

import re
from collections.abc import Iterator
from fnmatch import fnmatchcase
from functools import cache

from pygments.lexers import get_all_lexers

HEAD = 4096  # characters that tell the languages of one suffix apart

# Linguist's names where Pygments has others.
RENAMED = {
    "ActionScript 3": "ActionScript",
    "Ampl": "AMPL",
    "Arduino": "C++",
    "BST": "BibTeX Style",
    "Bash": "Shell",
    "Bash Session": "ShellSession",
    "COBOLFree": "COBOL",
    "CUDA": "Cuda",
    "ClojureScript": "Clojure",
    "Coldfusion CFC": "ColdFusion CFC",
    "Coldfusion HTML": "ColdFusion",
    "Csound Orchestra": "Csound",
    "Delphi": "Pascal",
    "Desktop file": "desktop",
    "Django/Jinja": "Jinja",
    "Docker": "Dockerfile",
    "EmacsLisp": "Emacs Lisp",
    "FStar": "F*",
    "Fish": "fish",
    "FortranFixed": "Fortran",
    "FoxPro": "xBase",
    "GAS": "Unix Assembly",
    "Graphviz": "Graphviz (DOT)",
    "Groff": "Roff",
    "HTML+Handlebars": "Handlebars",
    "HTML+Twig": "Twig",
    "JSX": "JavaScript",
    "Java Server Page": "Java Server Pages",
    "Lean4": "Lean 4",
    "LessCss": "Less",
    "Literate Idris": "Idris",
    "Mathematica": "Wolfram Language",
    "Matlab": "MATLAB",
    "NASM": "Assembly",
    "Nginx configuration file": "Nginx",
    "Nimrod": "Nim",
    "ODIN": "Odin",
    "Org Mode": "Org",
    "POVRay": "POV-Ray SDL",
    "Perl6": "Raku",
    "Pig": "PigLatin",
    "PkgConfig": "pkg-config",
    "Properties": "Java Properties",
    "QBasic": "QuickBASIC",
    "REBOL": "Rebol",
    "RHTML": "HTML+ERB",
    "RPMSpec": "RPM Spec",
    "ReasonML": "Reason",
    "Rego": "Open Policy Agent",
    "Rexx": "REXX",
    "S": "R",
    "Sed": "sed",
    "Systemd": "INI",
    "Terraform": "HCL",
    "Text only": "Text",
    "Transact-SQL": "TSQL",
    "VB.net": "Visual Basic .NET",
    "VimL": "Vim script",
    "Web IDL": "WebIDL",
    "WebGPU Shading Language": "WGSL",
    "Zone": "DNS Zone",
    "aspx-cs": "ASP.NET",
    "aspx-vb": "ASP.NET",
    "autohotkey": "AutoHotkey",
    "g-code": "G-code",
    "liquid": "Liquid",
    "systemverilog": "SystemVerilog",
    "teal": "Teal",
    "verilog": "Verilog",
    "vhdl": "VHDL",
}

# Patterns that Pygments lacks or gives to another language.
NAMES = {
    "ANTLR": "*.g4",
    "AsciiDoc": "*.adoc *.asciidoc",
    "Assembly": "*.asm *.ASM",
    "Astro": "*.astro",
    "Blade": "*.blade.php",
    "C": "*.h.in *.c.in",
    "C#": "*.cake *.csx",
    "C++": "*.inl *.ipp *.tcc *.tpp *.txx *.cppm *.hh *.ixx",
    "CMake": "*.cmake.in",
    "Dockerfile": "*.dockerfile Containerfile Dockerfile.*",
    "Dune": "dune dune-project",
    "EJS": "*.ejs",
    "Emacs Lisp": ".emacs",
    "Fortran": "*.f77 *.for",
    "GLSL": "*.glsl *.fsh *.vsh *.comp",
    "Go Checksums": "go.sum",
    "Go Module": "go.mod",
    "Go Template": "*.tmpl",
    "GraphQL": "*.gql *.graphqls",
    "Groovy": "Jenkinsfile",
    "HTML+ERB": "*.erb",
    "HTML+Razor": "*.cshtml *.razor",
    "Haskell": "*.hsc",
    "Java Properties": "*.properties",
    "JSON with Comments": "*.jsonc tsconfig.json",
    "JavaScript": "*.es6",
    "Jinja": "*.j2 *.jinja *.jinja2",
    "Jupyter Notebook": "*.ipynb",
    "Kotlin": "*.kts",
    "Lex": "*.l *.lex",
    "Linker Script": "*.ld *.lds",
    "M4": "*.m4",
    "M4Sugar": "*.at configure.ac configure.in",
    "MDX": "*.mdx",
    "Makefile": "Kbuild mkfile *.make",
    "Microsoft Visual Studio Solution": "*.sln",
    "Ninja": "*.ninja",
    "PHP": "*.phpt *.php3 *.php4 *.php5 *.ctp",
    "PLSQL": "*.pls *.pkb *.pks *.plsql",
    "PLpgSQL": "*.pgsql",
    "Pascal": "*.lpr",
    "Perl": "Makefile.PL cpanfile *.psgi",
    "Pod": "*.pod",
    "PowerShell": "*.psd1",
    "Prisma": "*.prisma",
    "Pug": "*.pug *.jade",
    "Python": "*.gyp *.gypi *.wsgi wscript",
    "QMake": "*.pri",
    "Ruby": "*.podspec *.jbuilder *.ru Appraisals Brewfile Fastfile Guardfile Podfile Puppetfile",
    "SVG": "*.svg",
    "SWIG": "*.i",
    "SQL": "*.sql *.mysql",
    "Scala": "*.sbt",
    "Shell": "*.bats *.sh.in gradlew mvnw .profile .envrc",
    "Starlark": "*.bzl *.star BUILD BUILD.bazel MODULE.bazel WORKSPACE WORKSPACE.bazel",
    "Svelte": "*.svelte",
    "TeX": "*.sty *.dtx *.ltx",
    "Texinfo": "*.texi *.texinfo *.txi",
    "TypeScript": "*.mts *.cts",
    "Unix Assembly": "*.s *.S",
    "XML": "*.csproj *.filters *.fsproj *.glade *.natvis *.nuspec *.plist *.props *.qrc *.resx *.storyboard *.targets "
    "*.ui *.vbproj *.vcxproj *.wxs *.xaml *.xib *.xlf",
    "XS": "*.xs",
    "XSLT": "*.xsl *.xslt",
    "YAML": ".clang-format .clang-tidy",
    "Yacc": "*.y *.yacc *.yy",
    "jq": "*.jq",
}

# Suffixes of several languages: the first whose pattern stands at the beginning of a line.
SHARED = {
    "*.as": {"AngelScript": r"(?:int|void|float|bool)\s+\w+\s*\(", "ActionScript": ""},
    "*.bas": {"Visual Basic 6.0": r"Attribute VB_Name\b", "BASIC": r"\s*\d+\s+[A-Z]", "FreeBASIC": ""},
    "*.cl": {"OpenCL": r"(?:.*\s)?(?:__)?kernel\s|__\w+\s|\s*#(?:pragma|include|define|if)", "Common Lisp": ""},
    "*.cls": {"TeX": r"\s*[%\\]", "Visual Basic 6.0": r"VERSION \d", "Apex": r".*\bclass\s.*\{", "OpenEdge ABL": ""},
    "*.d": {
        "Makefile": r"[^\s#=;(]+\.\w+:( |$)",
        "DTrace": r"(?:BEGIN|END|\w*:\w*:\w*:\w*)\s*$",
        "D": r"\s*(?:module|import)\s.*;",
        "Text": "",
    },
    "*.def": {"Modula-2": r"\s*DEFINITION\s+MODULE\b", "C": ""},
    "*.fs": {"GLSL": r"\s*(?:#version|precision|uniform|varying|vec[234])\b", "Forth": r": |\\ ", "F#": ""},
    "*.h": {
        "Objective-C": r"\s*(?:@(?:interface|protocol|property|class|end|import)\b|#import\b)",
        "C++": r"\s*(?:(?:class|namespace)\s+\w[^;]*$|template\s*<|(?:public|private|protected)(?:\s+\w+)?:"
        r"|using\s+\w|class\s+\w+;|#\s*include\s+<(?:string|vector|map|memory|iostream|Q\w+)>)|.*\bstd::\w",
        "C": "",
    },
    "*.inc": {
        "PHP": r"\s*<\?(?:php\b|=|\s)",
        "HTML": r"\s*<[!a-zA-Z]",
        "Pascal": r"\s*(?:\{|\(\*|(?:unit|uses|procedure|begin)\b)",
        "POV-Ray SDL": r"\s*#(?:declare|local|macro|while)\b",
        "BitBake": r"(?:SUMMARY|DESCRIPTION|LICENSE|SRC_URI)\s*\??=",
        "Makefile": r"[\w.]+\s*[:+?]?=|\.PHONY:",
        "Assembly": r"\s*(?:;|%(?:macro|define)\b|\w+\s+(?:equ|EQU)\b)",
        "C++": r"\s*(?://|/\*|#\s*(?:include|if|define)\b)",
        "Text": "",
    },
    "*.m": {
        "Objective-C": r"\s*(?:@(?:interface|protocol|class|end|implementation|import)\b|#\s*(?:import|include)\b|//)",
        "Mercury": r":- module\b",
        "Wolfram Language": r"\s*(?:\(\*|BeginPackage\[)",
        "MATLAB": "",
    },
    "*.mm": {"XML": r"\s*<map\b", "Objective-C++": ""},
    "*.mod": {"Modula-2": r"\s*(?:\w+\s+)?MODULE\b", "XML": r"\s*<!(?:ENTITY|--)", "AMPL": ""},
    "*.pl": {"Prolog": r"\s*:-\s*\w|[a-z]\w*(?:\([^#]*\))?\s*:-", "Raku": r"\s*use\s+v6\b", "Perl": ""},
    "*.pm": {"X PixMap": r"\s*/\* XPM \*/", "Raku": r"\s*(?:use\s+v6\b|unit\s+\w)", "Perl": ""},
    "*.pp": {"Pascal": r"(?i:\s*(?:program|unit|library|uses)\b|\s*\{\$)", "Puppet": ""},
    "*.pro": {"Prolog": r"[a-z]\w*\([^#]*\)\s*:-|:-\s", "IDL": r"(?i:\s*(?:pro|function)\s+\w+)", "QMake": ""},
    "*.r": {"Rebol": r"(?i:.*\b(?:rebol|red(?:/system)?)\s*\[)", "R": ""},
    "*.sc": {"Scala": r"\s*(?:import|object|def|val|package)\s", "SuperCollider": ""},
    "*.t": {"Raku": r"\s*use\s+v6\b", "Turing": r"\s*(?:%|(?:proc|fcn)\s+\w)", "Perl": ""},
    "*.ts": {"XML": r"\s*<(?:\?xml|!DOCTYPE|TS)\b", "TypeScript": ""},
    "*.v": {
        "Rocq Prover": r"\s*(?:(?:From\s+[\w.]+\s+)?Require\b|(?:Theorem|Lemma|Definition|Fixpoint|Section)\b|\(\*)",
        "V": r"\s*(?:pub\s+)?fn\s+\w",
        "Verilog": "",
    },
}

_INTERPRETER = re.compile(r"#!\s*\S*?(?:/env\s+(?:-\S+\s+|\w+=\S*\s+)*(?:\S*/)?|/)([A-Za-z]+)[\d.]*(?:\s|$)")
_INTERPRETERS = {
    "ash": "Shell",
    "dash": "Shell",
    "node": "JavaScript",
    "nodejs": "JavaScript",
    "bun": "TypeScript",
    "deno": "TypeScript",
    "pypy": "Python",
    "osascript": "AppleScript",
    "gmake": "Makefile",
    "make": "Makefile",
    "nawk": "Awk",
    "tclsh": "Tcl",
    "wish": "Tcl",
    "expect": "Tcl",
}


def language_of(name: str, text: str) -> str | None:
    """The language of a file of that name or path whose text begins with `text`, or None."""
    base, head = name.rpartition("/")[2], text[:HEAD]
    for pattern in _patterns(base):
        if pattern in SHARED:
            return next(language for language, evidence in _shared(pattern) if evidence.search(head))
        if pattern in _languages():
            return _languages()[pattern]
    script = _INTERPRETER.match(head)
    return _interpreters().get(script[1]) if script else None


def _patterns(name: str) -> Iterator[str]:
    """What may stand for a name in the tables: itself, a pattern like `Makefile.*`, and `*` with each of its suffixes,
    the longest first; then the same in lower case."""
    for variant in dict.fromkeys((name, name.lower())):
        yield variant
        yield from (glob for glob in _globs() if fnmatchcase(variant, glob))
        yield from (f"*{variant[dot:]}" for dot, letter in enumerate(variant) if letter == ".")


@cache
def _languages() -> dict[str, str]:
    """Languages by pattern."""
    of_pygments = {
        pattern: RENAMED.get(name, name)
        for name, _, patterns, _ in get_all_lexers(plugins=False)
        for pattern in patterns
    }
    return of_pygments | {pattern: name for name, patterns in NAMES.items() for pattern in patterns.split()}


@cache
def _globs() -> list[str]:
    """The few patterns with another wildcard than a leading `*`."""
    return [pattern for pattern in _languages() if re.search(r"[*?\[]", pattern.removeprefix("*"))]


@cache
def _shared(pattern: str) -> list[tuple[str, re.Pattern[str]]]:
    return [(name, re.compile(rf"^(?:{evidence})", re.MULTILINE)) for name, evidence in SHARED[pattern].items()]


@cache
def _interpreters() -> dict[str, str]:
    """Languages by the name of their interpreter, without its version."""
    aliases = {
        alias: RENAMED.get(name, name) for name, aliases, _, _ in get_all_lexers(plugins=False) for alias in aliases
    }
    return aliases | _INTERPRETERS
