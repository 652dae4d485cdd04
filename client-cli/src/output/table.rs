//! Tables for people.

use comfy_table::presets::UTF8_FULL_CONDENSED;
use comfy_table::{CellAlignment, ColumnConstraint, ContentArrangement};

/// A table with a header. On a terminal that is too narrow for it the last column is broken into
/// lines; elsewhere a row is one line.
#[derive(Debug)]
pub struct Table {
    table: comfy_table::Table,
}

impl Table {
    /// A table with these columns. A name that starts with `>` makes a column of numbers.
    pub fn new(columns: &[&str]) -> Self {
        let mut table = comfy_table::Table::new();
        table
            .load_style(UTF8_FULL_CONDENSED)
            .set_content_arrangement(ContentArrangement::Dynamic);
        table.set_header(columns.iter().map(|name| name.trim_start_matches('>')));
        for index in 0..columns.len().saturating_sub(1) {
            if let Some(column) = table.column_mut(index) {
                column.set_constraint(ColumnConstraint::ContentWidth);
            }
        }
        for (index, name) in columns.iter().enumerate() {
            if let (true, Some(column)) = (name.starts_with('>'), table.column_mut(index)) {
                column.set_cell_alignment(CellAlignment::Right);
            }
        }
        Self { table }
    }

    /// Adds a row.
    pub fn row<T: Into<String>>(&mut self, cells: impl IntoIterator<Item = T>) {
        self.table
            .add_row(cells.into_iter().map(Into::into).collect::<Vec<String>>());
    }
}

impl std::fmt::Display for Table {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.table.fmt(f)
    }
}

/// A table of names and values.
pub fn pairs<K: Into<String>, V: Into<String>>(rows: impl IntoIterator<Item = (K, V)>) -> String {
    let mut table = comfy_table::Table::new();
    table
        .load_style(UTF8_FULL_CONDENSED)
        .set_content_arrangement(ContentArrangement::Disabled);
    for (name, value) in rows {
        table.add_row(vec![name.into(), value.into()]);
    }
    if let Some(column) = table.column_mut(1) {
        column.set_cell_alignment(CellAlignment::Right);
    }
    table.to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_narrow_terminal_breaks_the_last_column_alone() {
        let mut table = Table::new(&["span", "what"]);
        table.row(["└─ handle_fault", "vm=1 vcpu=0 gfn=0x1 level=1"]);
        let wide = table.to_string();
        assert!(wide.contains("vm=1 vcpu=0 gfn=0x1 level=1"), "{wide}");
        table.table.set_width(40);
        let narrow = table.to_string();
        assert!(
            narrow.lines().all(|line| line.chars().count() <= 40),
            "{narrow}"
        );
        assert!(
            narrow.contains("│ └─ handle_fault ┆ vm=1 vcpu=0"),
            "{narrow}"
        );
    }

    #[test]
    fn numbers_are_set_to_the_right() {
        let mut table = Table::new(&["name", ">count"]);
        table.row(["a", "5"]);
        table.row(["b", "12345"]);
        let text = table.to_string();
        assert!(text.contains("│ a    ┆     5 │"), "{text}");
        assert!(pairs([("rpcs", "7")]).contains("rpcs ┆ 7"), "{text}");
    }
}
