//! A table that fits a width: selects columns, chooses their widths, and formats the lines.

use std::borrow::Cow;

use unicode_width::{UnicodeWidthChar, UnicodeWidthStr};

use crate::printable;

/// The number of spaces between two columns.
const GAP: usize = 2;

/// A column of a table.
#[derive(Debug, Clone)]
pub(super) struct Column {
    pub(super) title: &'static str,
    pub(super) align: Align,
    /// If there is no room for all columns, those with the largest number are left out first; 0 is
    /// always shown.
    pub(super) importance: u8,
    /// The width that text may be cut to if there is no room for all of it.
    pub(super) least: usize,
    pub(super) cells: Vec<Cell>,
}

/// The content of a cell.
#[derive(Debug, Clone, Default)]
pub(super) struct Cell {
    text: String,
    /// SGR parameters (ECMA-48) for the style, or empty.
    style: &'static str,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Align {
    Left,
    Right,
}

impl Cell {
    /// A cell with this text, with characters that a terminal obeys replaced.
    pub(super) fn new(text: impl Into<String>) -> Self {
        let text = text.into();
        let clean = match printable::line(&text) {
            Cow::Owned(clean) => clean,
            Cow::Borrowed(_) => text,
        };
        // A tab has no fixed width.
        Self { text: clean.replace('\t', " "), style: "" }
    }

    pub(super) fn styled(self, style: &'static str) -> Self {
        Self { style, ..self }
    }
}

impl Column {
    /// The width if there is enough room.
    fn natural(&self) -> usize {
        let cells = self.cells.iter().map(|cell| cell.text.width());
        cells.chain([self.title.len()]).max().unwrap_or_default()
    }

    /// The smallest width.
    fn narrowest(&self) -> usize {
        self.natural().min(self.least.max(self.title.len()))
    }
}

/// The table as lines of at most `width` terminal columns. If needed, leaves out the least
/// important columns and cuts long texts. Uses colours and bold only if `styled`.
pub(super) fn lines(columns: &[Column], width: Option<usize>, styled: bool) -> Vec<String> {
    let shown = fitting(columns, width.unwrap_or(usize::MAX));
    let style = |text: String, style: &str| match styled && !style.is_empty() {
        true => format!("\x1b[{style}m{text}\x1b[0m"),
        false => text,
    };
    let rows = columns.iter().map(|column| column.cells.len()).max().unwrap_or_default();
    let line = |cells: Vec<(String, &str)>| {
        let mut line = String::new();
        for (index, (text, how)) in cells.iter().enumerate() {
            let last = index + 1 == cells.len();
            let text = if last { text.trim_end() } else { text };
            if index > 0 {
                line.push_str(&" ".repeat(GAP));
            }
            line.push_str(&style(text.to_owned(), how));
        }
        match styled {
            true => line,
            // An empty last cell would leave trailing spaces.
            false => line.trim_end().to_owned(),
        }
    };
    let title = |&(column, width): &(&Column, usize)| (column.fill(column.title, width), "1");
    let head = line(shown.iter().map(title).collect());
    let body = (0..rows).map(|row| {
        let cell = |&(column, width): &(&Column, usize)| {
            let cell = column.cells.get(row).cloned().unwrap_or_default();
            (column.fill(&cell.text, width), cell.style)
        };
        line(shown.iter().map(cell).collect())
    });
    [head].into_iter().chain(body).collect()
}

/// The columns to show, from left to right, and their widths.
fn fitting(columns: &[Column], width: usize) -> Vec<(&Column, usize)> {
    let mut by_importance: Vec<_> = columns.iter().enumerate().collect();
    by_importance.sort_by_key(|(_, column)| column.importance);
    // Add columns at their smallest width, one by one. If one does not fit, less important ones
    // that fit are still added.
    let (mut used, mut shown) = (0, Vec::new());
    for (index, column) in by_importance {
        let more = column.narrowest() + if used == 0 { 0 } else { GAP };
        if column.importance == 0 || used + more <= width {
            used += more;
            shown.push((index, column, column.narrowest()));
        }
    }
    // Distribute the remaining width, most important columns first.
    let mut left = width.saturating_sub(used);
    for (_, column, wide) in &mut shown {
        let more = left.min(column.natural() - *wide);
        *wide += more;
        left -= more;
    }
    // Even the columns that are always shown may not fit: then cut the widest.
    let mut over = used.saturating_sub(width);
    while over > 0 {
        let Some((_, _, widest)) = shown.iter_mut().max_by_key(|(_, _, wide)| *wide) else { break };
        if *widest <= 1 {
            break;
        }
        *widest -= 1;
        over -= 1;
    }
    shown.sort_by_key(|(index, _, _)| *index);
    shown.into_iter().map(|(_, column, wide)| (column, wide)).collect()
}

impl Column {
    /// `text` cut and padded to exactly `width`.
    fn fill(&self, text: &str, width: usize) -> String {
        let text = cut(text, width);
        let padding = " ".repeat(width.saturating_sub(text.width()));
        match self.align {
            Align::Left => text + &padding,
            Align::Right => padding + &text,
        }
    }
}

/// The displayed width of a line of [`lines`], without its style sequences.
pub(super) fn styled_width(line: &str) -> usize {
    let shown = line.split('\x1b').enumerate().map(|(index, part)| match index {
        0 => part.width(),
        _ => part.split_once('m').map_or(0, |(_, text)| text.width()),
    });
    shown.sum()
}

/// `text`, cut with an ellipsis if it does not fit.
pub(super) fn cut(text: &str, width: usize) -> String {
    if text.width() <= width {
        return text.to_owned();
    }
    let mut room = width.saturating_sub(1);
    let fits = |c: &char| {
        let wide = c.width().unwrap_or_default();
        let fits = wide <= room;
        room = room.saturating_sub(wide);
        fits
    };
    let mut cut: String = text.chars().take_while(fits).collect();
    if width > 0 {
        cut.push('…');
    }
    cut
}

#[cfg(test)]
mod tests {
    use super::*;

    fn column(title: &'static str, importance: u8, least: usize, cells: &[&str]) -> Column {
        let cells = cells.iter().map(|text| Cell::new(*text)).collect();
        Column { title, align: Align::Left, importance, least, cells }
    }

    fn columns() -> Vec<Column> {
        vec![
            column("NAME", 0, 4, &["web", "a-long-name"]),
            column("NOTE", 2, 6, &["the quick brown fox", ""]),
            Column { align: Align::Right, ..column("N", 1, 9, &["1", "23456"]) },
        ]
    }

    #[test]
    fn all_is_shown_where_there_is_room() {
        let expected = [
            "NAME         NOTE                     N",
            "web          the quick brown fox      1",
            "a-long-name                       23456",
        ];
        assert_eq!(lines(&columns(), None, false), expected);
        assert_eq!(lines(&columns(), Some(39), false), expected);
    }

    #[test]
    fn what_does_not_fit_is_cut_and_then_left_out() {
        assert_eq!(
            lines(&columns(), Some(32), false),
            [
                "NAME         NOTE              N",
                "web          the quick b…      1",
                "a-long-name                23456"
            ]
        );
        assert_eq!(lines(&columns(), Some(19), false)[2], "a-l…          23456");
        assert_eq!(lines(&columns(), Some(18), false)[2], "a-long-name  23456");
        assert_eq!(lines(&columns(), Some(8), false), ["NAME", "web", "a-long-…"]);
        assert_eq!(lines(&columns(), Some(2), false), ["N…", "w…", "a…"]);
    }

    #[test]
    fn no_line_is_ever_too_wide() {
        let mut columns = columns();
        columns[1].cells =
            vec![Cell::new("日本語のとても長い説明文"), Cell::new("tab\tand\nline\x1b[2J")];
        for width in 1..60 {
            for line in lines(&columns, Some(width), false) {
                assert!(
                    line.width() <= width && !line.contains(char::is_control),
                    "{width}: {line}"
                );
            }
        }
    }

    #[test]
    fn style_changes_no_text() {
        let mut columns = columns();
        let cells = std::mem::take(&mut columns[0].cells);
        columns[0].cells = cells.into_iter().map(|cell| cell.styled("32")).collect();
        let styled = lines(&columns, Some(32), true);
        assert!(styled[0].starts_with("\x1b[1mNAME       \x1b[0m  \x1b[1mNOTE"), "{styled:?}");
        assert!(styled[1].starts_with("\x1b[32mweb        \x1b[0m  the"), "{styled:?}");
        let strip = |line: &String| {
            let plain = ["\x1b[32m", "\x1b[1m", "\x1b[0m"]
                .iter()
                .fold(line.clone(), |l, s| l.replace(s, ""));
            plain.trim_end().to_owned()
        };
        assert_eq!(styled.iter().map(strip).collect::<Vec<_>>(), lines(&columns, Some(32), false));
        assert!(styled.iter().all(|line| styled_width(line) == 32), "{styled:?}");
    }
}
