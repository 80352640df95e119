-- A small shop with a support desk, for trying `python cli.py index`. SQLite.

CREATE TABLE customers (
    id INTEGER PRIMARY KEY,
    full_name TEXT NOT NULL,
    email TEXT NOT NULL UNIQUE,
    phone TEXT,
    country_code TEXT NOT NULL,
    registered_at TEXT NOT NULL DEFAULT CURRENT_TIMESTAMP
);

CREATE TABLE loyalty_accounts (
    customer_id INTEGER PRIMARY KEY REFERENCES customers (id) ON DELETE CASCADE,
    points_balance INTEGER NOT NULL DEFAULT 0 CHECK (points_balance >= 0),
    tier TEXT NOT NULL DEFAULT 'basic' CHECK (tier IN ('basic', 'silver', 'gold'))
);

CREATE TABLE product_categories (
    id INTEGER PRIMARY KEY,
    category_name TEXT NOT NULL UNIQUE,
    parent_category_id INTEGER REFERENCES product_categories (id)
);

CREATE TABLE products (
    id INTEGER PRIMARY KEY,
    sku TEXT NOT NULL UNIQUE,
    product_name TEXT NOT NULL,
    category_id INTEGER REFERENCES product_categories (id),
    price_cents INTEGER NOT NULL CHECK (price_cents >= 0),
    stock_quantity INTEGER NOT NULL DEFAULT 0
);

CREATE TABLE orders (
    id INTEGER PRIMARY KEY,
    customer_id INTEGER NOT NULL REFERENCES customers (id),
    order_status TEXT NOT NULL CHECK (order_status IN ('open', 'paid', 'shipped', 'delivered', 'cancelled')),
    delivery_address TEXT NOT NULL,
    ordered_at TEXT NOT NULL DEFAULT CURRENT_TIMESTAMP
);

CREATE TABLE order_items (
    order_id INTEGER NOT NULL REFERENCES orders (id) ON DELETE CASCADE,
    line_number INTEGER NOT NULL,
    product_id INTEGER NOT NULL REFERENCES products (id),
    quantity INTEGER NOT NULL CHECK (quantity > 0),
    unit_price_cents INTEGER NOT NULL,
    PRIMARY KEY (order_id, line_number)
);

CREATE TABLE payments (
    id INTEGER PRIMARY KEY,
    order_id INTEGER NOT NULL REFERENCES orders (id),
    payment_method TEXT NOT NULL CHECK (payment_method IN ('card', 'transfer', 'voucher')),
    amount_cents INTEGER NOT NULL CHECK (amount_cents > 0),
    paid_at TEXT NOT NULL
);

CREATE TABLE refunds (
    id INTEGER PRIMARY KEY,
    payment_id INTEGER NOT NULL REFERENCES payments (id),
    approved_by_agent_id INTEGER REFERENCES support_agents (id),
    refund_reason TEXT NOT NULL,
    amount_cents INTEGER NOT NULL CHECK (amount_cents > 0),
    refunded_at TEXT NOT NULL
);

CREATE TABLE shipments (
    id INTEGER PRIMARY KEY,
    order_id INTEGER NOT NULL REFERENCES orders (id),
    carrier TEXT NOT NULL,
    tracking_number TEXT UNIQUE,
    shipped_at TEXT,
    delivered_at TEXT
);

CREATE TABLE shipped_items (
    shipment_id INTEGER NOT NULL REFERENCES shipments (id) ON DELETE CASCADE,
    order_id INTEGER NOT NULL,
    line_number INTEGER NOT NULL,
    PRIMARY KEY (shipment_id, order_id, line_number),
    FOREIGN KEY (order_id, line_number) REFERENCES order_items (order_id, line_number)
);

CREATE TABLE support_agents (
    id INTEGER PRIMARY KEY,
    full_name TEXT NOT NULL,
    team_lead_id INTEGER REFERENCES support_agents (id),
    hired_on TEXT NOT NULL
);

CREATE TABLE support_tickets (
    id INTEGER PRIMARY KEY,
    customer_id INTEGER NOT NULL REFERENCES customers (id),
    order_id INTEGER REFERENCES orders (id),
    assigned_agent_id INTEGER REFERENCES support_agents (id) ON DELETE SET NULL,
    subject TEXT NOT NULL,
    ticket_status TEXT NOT NULL CHECK (ticket_status IN ('open', 'waiting', 'solved')),
    opened_at TEXT NOT NULL,
    solved_at TEXT
);

CREATE TABLE ticket_messages (
    id INTEGER PRIMARY KEY,
    ticket_id INTEGER NOT NULL REFERENCES support_tickets (id) ON DELETE CASCADE,
    is_from_customer INTEGER NOT NULL CHECK (is_from_customer IN (0, 1)),
    message_text TEXT NOT NULL,
    sent_at TEXT NOT NULL
);

CREATE TABLE satisfaction_ratings (
    ticket_id INTEGER PRIMARY KEY REFERENCES support_tickets (id) ON DELETE CASCADE,
    stars INTEGER NOT NULL CHECK (stars BETWEEN 1 AND 5),
    remark TEXT
);

CREATE TABLE ticket_labels (
    id INTEGER PRIMARY KEY,
    label_name TEXT NOT NULL UNIQUE
);

CREATE TABLE labels_of_tickets (
    ticket_id INTEGER NOT NULL REFERENCES support_tickets (id) ON DELETE CASCADE,
    label_id INTEGER NOT NULL REFERENCES ticket_labels (id),
    PRIMARY KEY (ticket_id, label_id)
);

CREATE INDEX orders_by_customer ON orders (customer_id, ordered_at);
CREATE INDEX messages_by_ticket ON ticket_messages (ticket_id, sent_at);

CREATE VIEW open_tickets AS
SELECT t.id, t.subject, t.opened_at, c.full_name AS customer_name, a.full_name AS agent_name
FROM support_tickets t
JOIN customers c ON c.id = t.customer_id
LEFT JOIN support_agents a ON a.id = t.assigned_agent_id
WHERE t.ticket_status <> 'solved';
