"""Questions about databases, each with the tables and relationships that answer it.

They were written before the texts were tuned with them. The first database is the sample; the second checks that the same
texts help elsewhere.
"""

from __future__ import annotations

from database_docs.sample_database import SAMPLE_SCHEMA

Question = tuple[str, tuple[str, ...]]

SHOP_SCHEMA = SAMPLE_SCHEMA.read_text(encoding="utf-8")

SHOP: tuple[Question, ...] = (
    ("where are refunds stored", ("refunds",)),
    ("who approved a payment", ("refunds", "refunds(approved_by_agent_id) -> support_agents(id)")),
    ("how did a customer pay", ("payments",)),
    ("how many loyalty points does somebody have", ("loyalty_accounts",)),
    ("who works in the support team", ("support_agents",)),
    ("tracking number of a parcel", ("shipments",)),
    ("e-mail address of a buyer", ("customers",)),
    ("what was bought in an order", ("order_items",)),
    ("how happy were people with our help", ("satisfaction_ratings",)),
    ("what was written in a ticket", ("ticket_messages",)),
    (
        "tags on tickets",
        (
            "ticket_labels",
            "labels_of_tickets",
            "labels_of_tickets(label_id) -> ticket_labels(id)",
            "labels_of_tickets(ticket_id) -> support_tickets(id)",
        ),
    ),
    ("how much of an article is in the warehouse", ("products",)),
    ("what does an article cost", ("products",)),
    (
        "hierarchy of product categories",
        ("product_categories", "product_categories(parent_category_id) -> product_categories(id)"),
    ),
    ("tickets that are not solved yet", ("open_tickets", "support_tickets")),
    ("which items are in which parcel", ("shipped_items", "shipped_items(shipment_id) -> shipments(id)")),
    ("where was an order sent to", ("orders", "shipments")),
    ("who is the boss of an agent", ("support_agents", "support_agents(team_lead_id) -> support_agents(id)")),
    ("complaints that customers opened", ("support_tickets",)),
    ("gold and silver members", ("loyalty_accounts",)),
    ("was it paid by card or by voucher", ("payments",)),
    ("when did the package arrive", ("shipments",)),
    ("in which country does a customer live", ("customers",)),
    ("star rating of a ticket", ("satisfaction_ratings",)),
    ("reason for giving money back", ("refunds",)),
    ("cancelled orders", ("orders",)),
    ("when was an employee hired", ("support_agents",)),
    ("how do I join orders and customers", ("orders(customer_id) -> customers(id)",)),
    ("how are refunds connected to payments", ("refunds(payment_id) -> payments(id)",)),
    (
        "which agent is a ticket assigned to",
        ("support_tickets", "support_tickets(assigned_agent_id) -> support_agents(id)"),
    ),
    ("link between shipments and orders", ("shipments(order_id) -> orders(id)",)),
    ("join order lines with products", ("order_items(product_id) -> products(id)",)),
    ("how do messages belong to tickets", ("ticket_messages(ticket_id) -> support_tickets(id)",)),
    ("which category is a product in", ("products", "products(category_id) -> product_categories(id)")),
    ("which order is a ticket about", ("support_tickets", "support_tickets(order_id) -> orders(id)")),
    ("phone number of a customer", ("customers",)),
)

CLINIC_SCHEMA = """
CREATE TABLE patients (id INTEGER PRIMARY KEY, family_name TEXT NOT NULL, given_name TEXT NOT NULL, birth_date TEXT,
    blood_group TEXT, insurer_id INTEGER REFERENCES insurers (id));
CREATE TABLE insurers (id INTEGER PRIMARY KEY, company_name TEXT NOT NULL, contract_number TEXT);
CREATE TABLE physicians (id INTEGER PRIMARY KEY, full_name TEXT NOT NULL, specialty TEXT, ward_id INTEGER REFERENCES
    wards (id));
CREATE TABLE wards (id INTEGER PRIMARY KEY, ward_name TEXT NOT NULL, floor INTEGER, head_physician_id INTEGER
    REFERENCES physicians (id));
CREATE TABLE beds (id INTEGER PRIMARY KEY, ward_id INTEGER NOT NULL REFERENCES wards (id), room TEXT NOT NULL,
    is_occupied INTEGER NOT NULL DEFAULT 0);
CREATE TABLE appointments (id INTEGER PRIMARY KEY, patient_id INTEGER NOT NULL REFERENCES patients (id),
    physician_id INTEGER NOT NULL REFERENCES physicians (id), starts_at TEXT NOT NULL, state TEXT NOT NULL CHECK
    (state IN ('planned', 'done', 'missed')));
CREATE TABLE diagnoses (id INTEGER PRIMARY KEY, patient_id INTEGER NOT NULL REFERENCES patients (id), icd_code TEXT
    NOT NULL, found_on TEXT);
CREATE TABLE medications (id INTEGER PRIMARY KEY, trade_name TEXT NOT NULL, substance TEXT NOT NULL, strength TEXT);
CREATE TABLE prescriptions (id INTEGER PRIMARY KEY, patient_id INTEGER NOT NULL REFERENCES patients (id),
    physician_id INTEGER NOT NULL REFERENCES physicians (id), medication_id INTEGER NOT NULL REFERENCES medications
    (id), dose TEXT, valid_until TEXT);
CREATE TABLE allergies (patient_id INTEGER NOT NULL REFERENCES patients (id), medication_id INTEGER NOT NULL
    REFERENCES medications (id), PRIMARY KEY (patient_id, medication_id));
CREATE TABLE lab_results (id INTEGER PRIMARY KEY, patient_id INTEGER NOT NULL REFERENCES patients (id), test_name
    TEXT NOT NULL, measured_value REAL, unit TEXT, taken_at TEXT);
CREATE TABLE invoices (id INTEGER PRIMARY KEY, patient_id INTEGER NOT NULL REFERENCES patients (id), insurer_id
    INTEGER REFERENCES insurers (id), total_cents INTEGER NOT NULL, sent_at TEXT, paid_at TEXT);
"""

CLINIC: tuple[Question, ...] = (
    ("where are the doctors listed", ("physicians",)),
    ("date of birth of a patient", ("patients",)),
    (
        "which drugs must a patient not get",
        ("allergies", "allergies(medication_id) -> medications(id)", "allergies(patient_id) -> patients(id)"),
    ),
    ("blood test values", ("lab_results",)),
    ("unpaid bills", ("invoices",)),
    ("free beds", ("beds",)),
    ("who leads a ward", ("wards", "wards(head_physician_id) -> physicians(id)")),
    ("missed visits", ("appointments",)),
    ("which illness does somebody have", ("diagnoses",)),
    ("dose of a medicine that was prescribed", ("prescriptions",)),
    ("active ingredient of a drug", ("medications",)),
    ("health insurance companies", ("insurers",)),
    ("how are patients connected to their insurer", ("patients(insurer_id) -> insurers(id)",)),
    ("join appointments and physicians", ("appointments(physician_id) -> physicians(id)",)),
    ("on which floor is a ward", ("wards",)),
    ("who prescribed a medicine", ("prescriptions", "prescriptions(physician_id) -> physicians(id)")),
)
