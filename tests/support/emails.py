"""Forty e-mails with their answers, as somebody exports them from Excel in a country of semicolons."""

from __future__ import annotations

import csv
import io

HEADER = ("Nr", "Datum", "Kundenmail", "Unsere Antwort", "Kategorie")
NAMES = ("Müller", "Schmidt", "Weber", "Fischer", "Wagner", "Becker", "Hoffmann", "Schäfer", "Koch", "Bauer")
TOPICS = (
    ("die Heizung bleibt kalt", "den Techniker"), ("die Rechnung ist doppelt gekommen", "eine Gutschrift"),
    ("das Paket ist beschädigt", "Ersatz"), ("der Termin passt nicht mehr", "einen neuen Termin"),
    ("das Passwort geht nicht", "einen neuen Link"), ("die Lieferung fehlt", "den Stand der Sendung"),
    ("der Vertrag soll enden", "die Bestätigung"), ("der Preis ist gestiegen", "eine Erklärung"),
)  # fmt: skip


def emails(count: int = 40) -> list[tuple[str, ...]]:
    """Return the rows: number, date, what a customer wrote, what was answered, category."""
    rows = []
    for number in range(count):
        name, (trouble, cure) = NAMES[number % 10], TOPICS[number * 3 % 8]
        title = "Frau" if number % 2 else "Herr"
        asked = f"Hallo,\n\nseit {number + 2} Tagen: {trouble}; was tun? Kundennummer {7919 * (number + 1) % 10007}.\n\nGruß\n{name}"
        answer = (
            f"Guten Tag {title} {name},\n\nvielen Dank für Ihre Nachricht. Wir haben Ihren Fall geprüft und senden Ihnen heute {cure}. "
            "Sie müssen nichts weiter tun, und die Kosten übernehmen wir.\n\nViele Grüße\nIhr Team Nord"
        )
        rows.append((str(number + 1), f"{1 + number % 28:02d}.03.2026", asked, answer, "Service"))
    return rows


def as_csv(header: tuple[str, ...], rows: list[tuple[str, ...]], separator: str = ";") -> bytes:
    """Write a table as Excel does: byte order mark, Windows line ends, line breaks inside cells."""
    text = io.StringIO()
    csv.writer(text, delimiter=separator, lineterminator="\r\n").writerows([header, *rows])
    return b"\xef\xbb\xbf" + text.getvalue().encode()
