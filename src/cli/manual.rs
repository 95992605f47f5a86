//! `lbd man`: the manual pages. Commands and options are described from their definitions, the rest
//! from the documentation in the repository: nothing is written twice.

mod markdown;

use std::{fs, io, path::Path};

use clap::Command;
use clap_mangen::{
    Man,
    roff::{Roff, bold, roman},
};

const README: &str = include_str!("../../README.md");
const OPERATING: &str = include_str!("../../docs/OPERATING.md");

/// The first page: lbd(1), with the examples of all commands.
///
/// # Errors
///
/// None are known: it writes to memory.
pub(super) fn main_page(command: Command) -> io::Result<String> {
    page_of_all(&built(command))
}

/// Writes all pages into `folder`, as a tree of manual pages: `man1/lbd.1` and so on. Creates
/// missing folders.
///
/// # Errors
///
/// If a file or folder can't be written.
pub(super) fn write(command: Command, folder: &Path) -> io::Result<()> {
    let command = built(command);
    let save = |section: u8, name: &str, page: String| {
        let folder = folder.join(format!("man{section}"));
        fs::create_dir_all(&folder)?;
        fs::write(folder.join(format!("{name}.{section}")), page)
    };
    save(1, "lbd", page_of_all(&command)?)?;
    for command in command.get_subcommands() {
        save(1, command.get_display_name().unwrap_or_default(), command_page(command)?)?;
    }
    save(5, "lb.toml", file_page()?)
}

/// The command with everything that clap adds to it.
fn built(command: Command) -> Command {
    let mut command = command.disable_help_subcommand(true);
    command.build();
    command
}

fn page_of_all(command: &Command) -> io::Result<String> {
    let mut page = of_command(command)?;
    man(command).render_subcommands_section(&mut page)?;
    let mut more = Roff::new();
    for (title, document, heading) in [
        ("SIGNALS", README, "Signals"),
        ("EXIT STATUS", README, "Exit status"),
        ("FILES", OPERATING, "Files"),
        ("ENVIRONMENT", OPERATING, "Environment"),
    ] {
        documented(title, document, heading, &mut more);
    }
    more.control("SH", ["EXAMPLES"]);
    for command in [command].into_iter().chain(command.get_subcommands()) {
        let about = command.get_about().map(ToString::to_string).unwrap_or_default();
        more.control("TP", []).text([roman(about)]);
        commands(&Help::of(command).examples, &mut more);
    }
    let pages = command.get_subcommands().filter_map(Command::get_display_name);
    see_also(pages.map(|page| (page, "1")).chain([("lb.toml", "5"), ("systemd", "1")]), &mut more);
    more.to_writer(&mut page)?;
    Ok(String::from_utf8_lossy(&page).into_owned())
}

fn command_page(command: &Command) -> io::Result<String> {
    let mut page = of_command(command)?;
    let mut more = Roff::new();
    let help = Help::of(command);
    if !help.notes.is_empty() {
        more.control("SH", ["NOTES"]).text([roman(help.notes)]);
    }
    more.control("SH", ["EXAMPLES"]);
    commands(&help.examples, &mut more);
    see_also([("lbd", "1"), ("lb.toml", "5")].into_iter(), &mut more);
    more.to_writer(&mut page)?;
    Ok(String::from_utf8_lossy(&page).into_owned())
}

fn file_page() -> io::Result<String> {
    let mut roff = Roff::new();
    roff.control("TH", ["lb.toml", "5", DATE, &source(), MANUAL]);
    roff.control("SH", ["NAME"]).text([roman("lb.toml - what lbd runs, and how it routes to it")]);
    documented("DESCRIPTION", README, "The file", &mut roff);
    see_also([("lbd", "1"), ("lbd-check", "1"), ("lbd-reload", "1")].into_iter(), &mut roff);
    Ok(roff.render())
}

/// The title above each page.
const MANUAL: &str = "lbd";
/// The date of the commit; roff takes `""` for an unknown date.
const DATE: &str = env!("LBD_DATE");

fn source() -> String {
    format!("lbd {}", env!("CARGO_PKG_VERSION"))
}

fn man(command: &Command) -> Man {
    Man::new(command.clone()).date(DATE).source(source()).manual(MANUAL)
}

/// The part of a command's page that clap_mangen generates, up to the options.
fn of_command(command: &Command) -> io::Result<Vec<u8>> {
    let (man, mut page) = (man(command), Vec::new());
    man.render_title(&mut page)?;
    man.render_name_section(&mut page)?;
    man.render_synopsis_section(&mut page)?;
    man.render_description_section(&mut page)?;
    man.render_options_section(&mut page)?;
    Ok(page)
}

/// Adds a section from the documentation.
fn documented(title: &str, document: &str, heading: &str, roff: &mut Roff) {
    if let Some(section) = markdown::section(document, heading) {
        roff.control("SH", [title]);
        markdown::render(section, roff);
    }
}

fn commands(lines: &[String], roff: &mut Roff) {
    roff.control("EX", []);
    for line in lines {
        roff.text([roman(line)]);
    }
    roff.control("EE", []);
}

fn see_also<'a>(pages: impl Iterator<Item = (&'a str, &'a str)>, roff: &mut Roff) {
    let mut line = Vec::new();
    for (name, section) in pages {
        line.extend((!line.is_empty()).then(|| roman(", ")));
        line.extend([bold(name), roman(format!("({section})"))]);
    }
    roff.control("SH", ["SEE ALSO"]).text(line);
}

/// The text after the options in `--help`.
struct Help {
    examples: Vec<String>,
    notes: String,
}

impl Help {
    /// Parses "Example: …", or "Examples: …" with one per line, optionally followed by a paragraph.
    fn of(command: &Command) -> Self {
        let text = command.get_after_help().map(ToString::to_string).unwrap_or_default();
        let (examples, notes) = text.split_once("\n\n").unwrap_or((&text, ""));
        let examples = examples.trim_start_matches("Examples:").trim_start_matches("Example:");
        let examples = examples.lines().map(|line| line.trim().to_owned()).collect();
        Self { examples, notes: notes.to_owned() }
    }
}
