//! Tables on a terminal or in a file, as the operator's commands print them.

use std::io::IsTerminal;

/// Columns as wide as their widest cell, two spaces apart; nothing for no rows.
pub fn table(head: &[&str], rows: &[Vec<String>]) -> String {
    if rows.is_empty() {
        return String::new();
    }
    let head: Vec<String> = head.iter().map(|h| (*h).to_owned()).collect();
    let mut widths = vec![0usize; head.len()];
    for row in std::iter::once(&head).chain(rows) {
        for (width, cell) in widths.iter_mut().zip(row) {
            *width = (*width).max(visible_width(cell));
        }
    }
    let mut out = String::new();
    for row in std::iter::once(&head).chain(rows) {
        let pad = |(cell, width): (&String, &usize)| {
            format!("{cell}{}", " ".repeat(width.saturating_sub(visible_width(cell))))
        };
        let cells: Vec<String> = row.iter().zip(&widths).map(pad).collect();
        out += cells.join("  ").trim_end();
        out.push('\n');
    }
    out
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Colour {
    Green,
    Yellow,
    Red,
}

/// The text in a colour, if standard output is a terminal that wants colours.
pub fn coloured(text: &str, colour: Colour) -> String {
    if !std::io::stdout().is_terminal() || std::env::var_os("NO_COLOR").is_some() {
        return text.to_owned();
    }
    let code = match colour {
        Colour::Green => 32,
        Colour::Yellow => 33,
        Colour::Red => 31,
    };
    format!("\x1b[{code}m{text}\x1b[0m")
}

/// Characters without what only sets the colour.
fn visible_width(cell: &str) -> usize {
    let mut parts = cell.split('\x1b');
    let first = parts.next().map_or(0, |part| part.chars().count());
    first + parts.map(|part| part.split_once('m').map_or(0, |(_, text)| text.chars().count())).sum::<usize>()
}

/// Says on a terminal what is being waited for.
pub fn progress(text: &str) {
    if std::io::stderr().is_terminal() {
        eprintln!("{text}");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_align_and_lines_have_no_tail() {
        let rows = vec![vec!["a".to_owned(), "1".to_owned()], vec!["long name".to_owned(), "22".to_owned()]];
        assert_eq!(table(&["NAME", "N"], &rows), "NAME       N\na          1\nlong name  22\n");
        assert_eq!(table(&["NAME"], &[]), "");
    }

    #[test]
    fn colour_takes_no_room() {
        let rows = vec![vec!["\x1b[32mok\x1b[0m".to_owned(), "x".to_owned()], vec!["warn".to_owned(), "y".to_owned()]];
        assert_eq!(table(&["IS", "N"], &rows), "IS    N\n\x1b[32mok\x1b[0m    x\nwarn  y\n");
    }
}
