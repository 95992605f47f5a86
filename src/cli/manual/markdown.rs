//! Converts sections of the Markdown documentation into parts of a manual page.

use std::ops::Range;

use clap_mangen::roff::{Inline, Roff, bold, italic, roman};
use pulldown_cmark::{Event, HeadingLevel, Options, Parser, Tag, TagEnd};

/// The part of `document` under the heading `title`, including subsections; `None` if there is no
/// such heading.
pub(super) fn section<'a>(document: &'a str, title: &str) -> Option<&'a str> {
    let headings: Vec<(HeadingLevel, Range<usize>)> = Parser::new(document)
        .into_offset_iter()
        .filter_map(|(event, range)| match event {
            Event::Start(Tag::Heading { level, .. }) => Some((level, range)),
            _ => None,
        })
        .collect();
    let is_it =
        |range: &Range<usize>| document[range.clone()].trim_matches(['#', ' ', '\n']) == title;
    let at = headings.iter().position(|(_, range)| is_it(range))?;
    let (level, heading) = &headings[at];
    let next = headings[at + 1..].iter().find(|(other, _)| other <= level);
    Some(&document[heading.end..next.map_or(document.len(), |(_, range)| range.start)])
}

/// Appends `markdown` to the page.
pub(super) fn render(markdown: &str, roff: &mut Roff) {
    let mut page = Page {
        roff,
        line: Vec::new(),
        style: roman,
        begun: false,
        code: false,
        row: Vec::new(),
        titles: Vec::new(),
    };
    for event in Parser::new_ext(markdown, Options::ENABLE_TABLES) {
        page.take(event);
    }
}

/// A page that is being written.
struct Page<'a> {
    roff: &'a mut Roff,
    /// The content of the open heading, paragraph or cell.
    line: Vec<Inline>,
    style: fn(String) -> Inline,
    /// Whether the section has any content yet.
    begun: bool,
    /// Inside a code block, which is kept line by line.
    code: bool,
    row: Vec<Vec<Inline>>,
    /// The titles of the table's columns.
    titles: Vec<String>,
}

impl Page<'_> {
    fn take(&mut self, event: Event<'_>) {
        match event {
            Event::Start(Tag::Paragraph) => self.paragraph(),
            Event::End(TagEnd::Heading(_)) => {
                let title = plain(&std::mem::take(&mut self.line));
                self.roff.control("SS", [&*title]);
                self.begun = false;
            }
            Event::Start(Tag::CodeBlock(_)) => {
                self.paragraph();
                self.roff.control("RS", ["4"]).control("EX", []);
                self.code = true;
            }
            Event::End(TagEnd::CodeBlock) => {
                self.roff.control("EE", []).control("RE", []);
                self.code = false;
            }
            Event::Text(text) if self.code => {
                for line in text.lines() {
                    self.roff.text([roman(line)]);
                }
            }
            Event::Start(Tag::Emphasis) => self.style = italic,
            Event::Start(Tag::Strong) => self.style = bold,
            Event::End(TagEnd::Emphasis | TagEnd::Strong) => self.style = roman,
            Event::Text(text) => self.line.push((self.style)(text.into_string())),
            Event::Code(text) => self.line.push(bold(text.into_string())),
            Event::SoftBreak => self.line.push(roman(" ")),
            Event::End(TagEnd::Paragraph | TagEnd::Item) => self.end_line(),
            Event::Start(Tag::Item) => drop(self.roff.control("IP", ["\\(bu", "2"])),
            Event::End(TagEnd::TableCell) => self.row.push(std::mem::take(&mut self.line)),
            Event::End(TagEnd::TableHead) => {
                self.titles =
                    std::mem::take(&mut self.row).iter().map(|cell| plain(cell)).collect();
            }
            Event::End(TagEnd::TableRow) => self.end_row(),
            _ => {}
        }
    }

    /// Begins a paragraph. A section's first paragraph is begun by its heading.
    fn paragraph(&mut self) {
        if std::mem::replace(&mut self.begun, true) {
            self.roff.control("PP", []);
        }
    }

    fn end_line(&mut self) {
        if !self.line.is_empty() {
            self.roff.text(std::mem::take(&mut self.line));
        }
    }

    /// The first cell becomes the tag of a paragraph, the second its text. Further cells follow as
    /// sentences that begin with the column's title.
    fn end_row(&mut self) {
        let mut cells = std::mem::take(&mut self.row).into_iter();
        self.roff.control("TP", []).text(cells.next().unwrap_or_default());
        let mut body = cells.next().unwrap_or_default();
        if let Some(Inline::Roman(text)) = body.first_mut() {
            *text = sentence(text);
        }
        for (cell, title) in cells.zip(self.titles.iter().skip(2)) {
            body.push(roman(". "));
            body.push(roman(sentence(title) + ": "));
            body.extend(cell);
        }
        body.push(roman("."));
        self.roff.text(body);
        self.begun = true;
    }
}

/// The text with a capital first letter.
fn sentence(text: &str) -> String {
    let mut letters = text.chars();
    letters.next().map_or_else(String::new, |first| first.to_uppercase().chain(letters).collect())
}

fn plain(line: &[Inline]) -> String {
    let text = |part: &Inline| match part {
        Inline::Roman(text) | Inline::Italic(text) | Inline::Bold(text) => text.clone(),
        Inline::LineBreak => " ".to_owned(),
    };
    line.iter().map(text).collect()
}
