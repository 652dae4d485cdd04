//! Reading the tables.

use tdp_mmu::Mode;

/// One scenario.
pub(crate) struct Row {
    pub(crate) id: String,
    pub(crate) title: String,
    pub(crate) lines: Vec<Line>,
}

/// One line of it.
pub(crate) struct Line {
    pub(crate) number: usize,
    /// The mode that it is for, when it is not for both.
    pub(crate) mode: Option<Mode>,
    pub(crate) text: String,
}

/// The rows of a table; `#` starts a comment line.
pub(crate) fn parse(text: &str) -> Vec<Row> {
    let mut rows: Vec<Row> = Vec::new();
    for (at, line) in text.lines().enumerate() {
        let line = line.trim();
        if line.is_empty() || line.starts_with('#') {
            continue;
        }
        if let Some(header) = line.strip_prefix("== ") {
            let (id, title) = header.split_once(' ').expect("an id and a title");
            rows.push(Row {
                id: id.into(),
                title: title.into(),
                lines: Vec::new(),
            });
            continue;
        }
        let (mode, text) = match line.split_once(' ') {
            Some(("kernel", rest)) => (Some(Mode::Kernel), rest),
            Some(("batched", rest)) => (Some(Mode::Batched), rest),
            _ => (None, line),
        };
        let row = rows.last_mut().expect("a row before its lines");
        row.lines.push(Line {
            number: at + 1,
            mode,
            text: text.into(),
        });
    }
    rows
}
