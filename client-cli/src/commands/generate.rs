//! Completion scripts and the manual page, made from the definitions of the command line.

use clap::CommandFactory as _;
use clap_complete::Shell;

use crate::args::Cli;
use crate::error::Error;

/// The completion script of a shell.
pub(crate) fn completions(shell: Shell) -> Vec<u8> {
    let mut script = Vec::new();
    clap_complete::generate(shell, &mut Cli::command(), "mmuctl", &mut script);
    script
}

/// The manual page: the program, then each command as a section of its own.
pub(crate) fn manual() -> Result<Vec<u8>, Error> {
    let mut command = Cli::command();
    command.build();
    let mut page = Vec::new();
    clap_mangen::Man::new(command.clone())
        .render(&mut page)
        .map_err(Error::Output)?;
    for command in command.get_subcommands() {
        commands(command, &mut page).map_err(Error::Output)?;
    }
    Ok(page)
}

/// The sections of a command and of those below it.
fn commands(command: &clap::Command, page: &mut Vec<u8>) -> std::io::Result<()> {
    if command.get_name() == "help" {
        return Ok(());
    }
    if !command.has_subcommands() {
        section(command, page)?;
    }
    command
        .get_subcommands()
        .try_for_each(|command| commands(command, page))
}

fn section(command: &clap::Command, page: &mut Vec<u8>) -> std::io::Result<()> {
    let name = command
        .get_bin_name()
        .unwrap_or(command.get_name())
        .to_uppercase();
    page.extend_from_slice(format!(".SH {name}\n").as_bytes());
    let man = clap_mangen::Man::new(command.clone());
    let mut body = Vec::new();
    man.render_synopsis_section(&mut body)?;
    man.render_description_section(&mut body)?;
    man.render_options_section(&mut body)?;
    // Sections of a command are subsections of the whole page.
    let body = String::from_utf8_lossy(&body).replace(".SH ", ".SS ");
    page.extend_from_slice(body.as_bytes());
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_manual_names_every_command() {
        let page = String::from_utf8(manual().unwrap()).unwrap();
        for section in [
            "MMUCTL DEMO",
            "MMUCTL VM CREATE",
            "MMUCTL EXPLAIN",
            "MMUCTL MEASURE",
            "MMUCTL REPLAY",
            "MMUCTL SEAMCALL",
        ] {
            assert!(page.contains(&format!(".SH {section}\n")), "{section}");
        }
    }

    #[test]
    fn completions_know_the_commands() {
        for shell in [Shell::Bash, Shell::Zsh, Shell::Fish] {
            let script = String::from_utf8(completions(shell)).unwrap();
            assert!(script.contains("punch-hole"), "{shell}");
        }
    }
}
